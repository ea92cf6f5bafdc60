"""One file per method: its config, its pure functions, its registration (``register_method``)."""
