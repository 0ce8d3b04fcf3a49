"""What a user calls: checks of what was given, and the step that it asks for."""
