"""One file a method: its config, its pure functions, its registration (``method.register``)."""
