"""The slim checkpoint format (docs/format.md): spec, stores, reader, writer, inspect. Importing it loads no torch."""
