"""Small .safetensors files of what a calibration has found out."""

import safetensors
import safetensors.torch


class Profile:
    """What can be saved and loaded.

    A subclass has KIND, such as "cache profile"; VERSION, of its files; _content(), ({name: tensor}, {str: str}) to be written;
    the class method _of(tensors, about), which makes a profile of these; and _is_whole(), which tells whether everything is
    there and of the shapes that belong together. On wrong content these two may raise errors, as of a key that is not there.
    """

    def save(self, path):
        """Write a .safetensors file."""
        tensors, about = self._content()
        about = {"format": self._format(), "version": self.VERSION, **about}
        safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, path, about)

    @classmethod
    def load(cls, path):
        """Read a file that `save` wrote. Raises ValueError, with a sentence, for any other."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"it cannot be read as a .safetensors file ({error}); calibrate anew") from error
        if about.get("format") != cls._format() or about.get("version") != cls.VERSION:
            raise ValueError(f"it is no {cls.KIND}, or one of another version; calibrate anew")
        try:
            profile = cls._of(tensors, about)
            is_whole = profile._is_whole()
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"its content is not that of a {cls.KIND}; calibrate anew")
        return profile

    @classmethod
    def _format(cls):
        return f"iec_{cls.KIND}".replace(" ", "_")
