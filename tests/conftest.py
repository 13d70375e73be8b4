"""Makes the host-free core importable as `iec_core`."""

import pack

pack.load("iec_core")
