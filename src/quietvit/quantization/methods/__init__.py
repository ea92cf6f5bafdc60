"""One file a method: its config, its pure functions, its registration (``register_method``)."""
