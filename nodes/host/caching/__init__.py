"""Caches on a MODEL: of U-Nets and of transformers, with a schedule or by a profile."""
