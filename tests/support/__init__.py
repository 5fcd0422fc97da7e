"""What the tests share: import it as ``support``."""
