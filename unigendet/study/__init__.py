"""The study: the quickstart with a few settings changed (an arm), over several seeds, and what the differences are.

A seed decides the split of the digits, the fakes, the weights, the noise and the order, so all arms of a seed share
them, and differences are taken seed by seed. The test images of a split are never those on which the quickstart's
settings were chosen (``load_digits``). The folder it leaves:

    results/seed-0001/diga.json   one run: its metrics, what it cost, and every setting that decided it
    grids/seed-0001-diga.png      its first samples of every digit
    work/                         data and GDUF models of the seed in progress; gone when the seed is done
    report.html, study.json

A result appears whole or not at all, and is never made twice: the same command goes on with what is missing. What
decides a result is compared with what the settings say now, so results of different settings cannot mix.
"""
