"""The commands of ``vareid``: one file each, and ``common`` for what they share. ``_vareid_cli`` lists them."""
