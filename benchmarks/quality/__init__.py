"""Quality against counted bytes, of every method, on the trained models: `attnpack bench quality`.

A context is a prompt of many held-out images and a first question. A model compiled with a policy fills and packs its
cache, answers from it, and is then asked further questions, each after the first answer, and fed a long reference
(`contexts`, `answering`). Everything is paired with the dense model on the same contexts (`score`). `methods` has what
is compared, and how each comes to a given number of bytes.

Rewritten graphs run op by op: no policy changes what is computed after that, and Inductor would take most of the time.
Images are turned into embeddings once, since no policy changes those.
"""
