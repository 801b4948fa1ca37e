"""The prompts of a study of models that know the world; written for it, of all kinds of motion."""

from __future__ import annotations

PROMPTS = (
    "A lighthouse on a cliff in a storm, waves breaking against the rocks, slow aerial shot",
    "A golden retriever runs through shallow water towards the camera, drops glitter in the sun",
    "A potter's hands shape a bowl of wet clay on a turning wheel, close-up, warm light",
    "A red vintage tram crosses a busy square in the rain, people with umbrellas, static camera",
    "Steam rises from a cup of coffee on a wooden table beside a window, morning light, macro",
    "A dancer in a white dress turns on an empty stage, a single spotlight, the camera circles",
    "A hot-air balloon drifts over a valley in the fog at sunrise, wide shot",
    "An old fisherman mends a net on a quay, gulls behind him, documentary style",
    "A glass marble rolls along a wooden track and falls into a bowl, slow motion",
    "Autumn leaves blow across a cobbled street at night, neon signs in the puddles",
    "A train passes through a snowy forest, seen from above, the camera follows it",
    "A chef tosses vegetables in a flaming pan, sparks, handheld camera",
    "A sea turtle glides over a coral reef, sun rays through the water, fish in the background",
    "A child blows a dandelion in a meadow, the seeds fly towards the camera, shallow focus",
    "A timelapse of a city skyline from dusk to night, clouds move fast, lights go on",
)
