"""The native libraries. Importing this package loads nothing; `library` loads them when they are first asked for."""
