"""Measuring samples. Nothing here is imported by the rest of the package.

From the command line, `fastdiff evaluate`. In Python:

```py
>>> extractor, images = load_extractor("digits-classifier"), open_images("samples")
>>> reference = measure_reference(open_reference("digits"), extractor, images.shape, "cache", batch_size=64)
>>> table = extract_features(images, extractor, "cache", batch_size=64)
>>> evaluate(table, reference, EvaluationConfig())["metrics"]["fid"]
```
"""
