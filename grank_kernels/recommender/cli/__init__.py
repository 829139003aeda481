"""The console command `grank`."""
