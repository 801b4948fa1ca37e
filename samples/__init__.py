"""The bundled text-to-video model and its training, which are a part of the product.

`moving_shapes` holds the default model of the `diffattn` command, "moving-shapes", with the script
that trained it (`moving_shapes.train`). `adapt_bundled_model` trains a LoRA of that model. The
wheel contains the whole folder, and `diffattn.pipelines` imports from it.

The folder has the name "samples" because the project's layout fixes that name, and because the
model is a sample: small enough to try every method on it, offline and on a CPU.
"""
