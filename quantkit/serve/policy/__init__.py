"""Who runs next: pure functions over plain data, without torch."""
