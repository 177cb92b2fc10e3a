"""What a checkpoint is worth: perplexity, KL, agreement and word errors of one model, or of one against another.

No part of making a checkpoint. Takes checkpoint directories and text or audio; gives results and pictures of them.
"""
