"""Whole roots and factors: sizes of the parts that ids and rows are divided into."""

from __future__ import annotations


def root_ceiling(n: int, k: int) -> int:
    """Smallest integer ``m`` ≥ 1 with ``m**k >= n``; the float root is only a first guess."""
    root = max(1, round(n ** (1 / k)))
    while root**k < n:
        root += 1
    while root > 1 and (root - 1) ** k >= n:
        root -= 1
    return root


def balanced_factors(width: int, cores: int) -> tuple[int, ...]:
    """Factors of about equal size whose product is ``width``, the larger ones at the ends.

    The cores between the ends have two ranks, so a column costs most there.
    """
    factors = [1] * cores
    for prime in sorted(_prime_factors(width), reverse=True):
        smallest = factors.index(min(factors))
        factors[smallest] *= prime
    factors.sort(reverse=True)
    return (*factors[::2], *reversed(factors[1::2]))


def _prime_factors(number: int) -> list[int]:
    primes, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            primes.append(divisor)
            number //= divisor
        divisor += 1
    return [*primes, number] if number > 1 else primes
