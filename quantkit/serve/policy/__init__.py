"""Who may come in and who runs next: pure functions and small state, without torch.

`admission.Admission` decides at the door, `tiered.Tiered` decides in the engine; both read the
same `tiers.Tier` and `tiers.Tenant`. Times are seconds of the monotonic clock, given as ``now``.
"""
