"""The commands, by what they are for. Each parses, calls one public function, and prints."""
