"""What tests share: hypothesis keeps no clock and no database, and prints what reproduces a failure."""

import hypothesis

hypothesis.settings.register_profile("default", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("default")
