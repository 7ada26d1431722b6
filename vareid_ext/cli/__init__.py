"""The commands of the program: one file each, and ``common`` for what they share."""
