"""How good a model's verdicts, explanations and pictures are, and the pages that say so.

* Detectors: ``detection`` (metrics), ``reliability`` (of probabilities), ``explanations`` (their likeness to
  annotations), ``robustness`` (disturbed images), ``scoring`` (judging annotated images), ``detection_run`` (an
  evaluation that may be interrupted), ``calibration`` (fitting one).
* Generators: ``generation`` (Fréchet distance, the judge of digits), ``inception`` (features), ``generation_scores``.
* Several seeds: ``comparisons``.
* What is shown: ``results`` (of a quickstart, as values), ``quickstart_report``, ``detection_report``,
  ``study_report``, ``pages`` (what those share, with ``templates``), ``detection_curves``, ``figures``,
  ``contact_sheet``.
"""
