"""Small programs that use the library, each a file to copy from."""
