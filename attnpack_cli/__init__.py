"""The command line as far as it goes without PyTorch: what commands take, their help, and checks of what is given.

A package beside `attnpack_fx`, as importing any part of that one imports PyTorch: whoever writes `import attnpack_fx`
may use `torch.ops.attnpack` in the next line, so that it cannot wait until a name of it is first used. Nothing here
imports more than the standard library, and Pillow where a picture is given. What a command runs is named as text,
`"module:function"`, and imported when all checks have passed; the modules so named may use what stands here.
"""
