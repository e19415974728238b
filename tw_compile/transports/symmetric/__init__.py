"""The transports over symmetric memory, ``peer`` and ``multimem``: see ``transport``."""
