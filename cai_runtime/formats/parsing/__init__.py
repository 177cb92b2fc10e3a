"""What the conversation formats' parsers are made of: markers, a stream of text and markers to events, readers of JSON,
Python literals and typed XML values, and grammars. One format's own rules are in `cai_runtime.formats`."""
