"""Named training configurations: one complete YAML file each, which names every field and inherits nothing."""
