"""What every command shares: settings as flags, errors for users, files written whole, several processes."""
