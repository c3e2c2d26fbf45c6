"""The demo UNet's shape, in the terms of ComfyUI's `UNetModel`: SD1.5's make, 9 M parameters."""

CONFIG = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=64,
    num_res_blocks=[2, 2, 2],
    channel_mult=[1, 2, 2],
    num_head_channels=32,
    use_spatial_transformer=True,
    transformer_depth=[0, 0, 1, 1, 1, 1],
    transformer_depth_output=[0, 0, 0, 1, 1, 1, 1, 1, 1],
    transformer_depth_middle=1,
    context_dim=128,
    use_linear_in_transformer=False,
    adm_in_channels=None,
    use_temporal_attention=False,
    legacy=False,
)
