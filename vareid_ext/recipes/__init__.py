"""Named training configurations, one YAML file each: the fields that differ from those of `base`.

`base` is another recipe, which names no base itself; without one it is the defaults of ``vareid_ext.training.config``.
"""
