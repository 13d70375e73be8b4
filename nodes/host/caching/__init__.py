"""Feature caches on a MODEL, for U-Nets and transformers, with a schedule or a calibrated profile."""
