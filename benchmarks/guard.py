"""x"""

import numpy as np

RATE = 16000


def coloured(rng, samples, slope):
    """Noise whose power falls with frequency to the power of `slope` (0 white, 1 pink, 2 brown), of RMS 1."""
    spectrum = rng.standard_normal(samples // 2 + 1) + 1j * rng.standard_normal(samples // 2 + 1)
    frequency = np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 20)
    noise = np.fft.irfft(spectrum * frequency ** (-slope / 2), samples)
    return noise / np.sqrt(np.mean(noise**2))


def level(decibels):
    return 10 ** (decibels / 20)


def silence(rng, samples):
    kind = rng.integers(3)
    if kind == 0:
        return np.zeros(samples)
    if kind == 1:  # what is left of nothing in 16 bits
        return np.round(rng.random(samples) - rng.random(samples)) / 2**15
    t = np.arange(samples) / RATE
    mains = rng.choice([50, 60])
    hum = sum(np.sin(2 * np.pi * mains * k * t + rng.uniform(0, 6)) / k for k in (1, 2, 3, 5))
    return level(-55) * hum + level(-65) * coloured(rng, samples, 1)


def noise(rng, samples):
    return level(rng.uniform(-50, -12)) * coloured(rng, samples, rng.integers(3))


def note(pitch, samples, decay):
    t = np.arange(samples) / RATE
    wave = sum(np.sin(2 * np.pi * pitch * k * t) / k**1.5 for k in range(1, 6))
    return wave * np.minimum(t / 0.01, 1) * np.exp(-t / decay)


def chords(rng, samples):
    out, at = np.zeros(samples), 0
    while at < samples:
        length = min(int(rng.uniform(0.5, 2) * RATE), samples - at)
        root = 110 * 2 ** (rng.integers(24) / 12)
        out[at : at + length] = sum(note(root * 2 ** (step / 12), length, 2) for step in (0, rng.choice([3, 4]), 7))
        at += length
    return 0.1 * out


def arpeggio(rng, samples):
    out, at, step = np.zeros(samples), 0, int(rng.uniform(0.1, 0.3) * RATE)
    root = 110 * 2 ** (rng.integers(24) / 12)
    for i in range(0, samples, step):
        length = min(2 * step, samples - i)
        out[i : i + length] += note(root * 2 ** (rng.choice([0, 4, 7, 12, 16]) / 12), length, 0.2)
    return 0.15 * out


def drums(rng, samples):
    out, beat = np.zeros(samples), int(60 / rng.uniform(80, 160) / 2 * RATE)
    for i, at in enumerate(range(0, samples, beat)):
        n = min(int(0.2 * RATE), samples - at)
        t = np.arange(n) / RATE
        kick = np.sin(2 * np.pi * (50 * t + 8 * (1 - np.exp(-t / 0.03)))) * np.exp(-t / 0.08)
        snare = coloured(rng, n + 2, 0)[:n] * np.exp(-t / 0.05) * 0.4
        hat = np.diff(coloured(rng, n + 3, 0))[:n] * np.exp(-t / 0.015) * 0.15
        out[at : at + n] += hat + (kick if i % 4 == 0 else snare if i % 4 == 2 else 0)
    return 0.4 * out

def beeps(rng, samples):
    t = np.arange(samples) / RATE
    tone = np.sin(2 * np.pi * rng.uniform(200, 3000) * t)
    return 0.2 * tone * (1 if rng.random() < 0.5 else (t % 1 < rng.uniform(0.2, 0.8)))
KINDS = dict(silence=silence, noise=noise, chords=chords, arpeggio=arpeggio, drums=drums, beeps=beeps)
