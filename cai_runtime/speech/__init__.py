"""Transcription by Whisper: from windows of log-mel features to text, segments and words.

`options` what the caller wants; `tokens` a checkpoint's control tokens; `rules` which token may come next; `prompts` what
the decoder is given; `decoding` one window, with its fallback to higher temperatures; `segments` from tokens to times;
`sequential` and `together` a whole file; `transcriber` ties them; `api.transcriptions.running` runs them on an engine.

A transcription is a generator. It yields requests for an engine and is sent their results, so it knows no thread, no event
loop and no tensor. Sources: Radford et al., "Robust speech recognition via large-scale weak supervision" (2022), whose
section 4.5 is the long-form strategy; the options' names and defaults are faster-whisper's.
"""
