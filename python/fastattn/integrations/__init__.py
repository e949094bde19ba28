"""fastattn inside other libraries' models. Each module needs the extra of its name."""
