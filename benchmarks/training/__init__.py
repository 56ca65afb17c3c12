"""Train the small vision-language models of `benchmarks/assets` on handwritten digits.

    python -m benchmarks.training llava --out benchmarks/assets/digits-llava --minutes 60 --seed 0
    python -m benchmarks.training qwen3_vl --out benchmarks/assets/digits-qwen3-vl --minutes 60 --seed 0

The data are the training split of `attnpack_fx.demo.digits`; `families` has the models, `batches` the contexts and
the curriculum, `run` the optimisation. Training has two phases. First the vision tower learns to name, from every
patch, the digit the patch belongs to. Then the tower is frozen and the decoder and what projects the images into it
learn the tasks, with a curriculum over the number of images in a prompt. A context holds several questions, and the
loss is taken on the answers only. In most contexts each question sees the images but no other question, and has the
positions it would have alone; in others the questions follow each other as turns; in the rest one question has a long
answer. Half of the prompts of less than 16 images are cut out of a prompt of 16: images are left out, but names and
positions stay those of the full prompt. The weights that are saved are an exponential average.

The schedule is a share of ``--minutes`` of training time, so that a slower computer gets fewer steps. With ``--state``
the run is saved regularly and resumed from there. ``--start FOLDER`` goes on from a trained model, with the decoder
phase and the last stage of the curriculum.
"""
