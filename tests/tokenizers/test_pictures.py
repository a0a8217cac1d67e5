"""Pictures of what a tokenizer does."""

import colorsys

import torch

from foreseen.tokenizers.pictures import code_map, palette, strip


def test_colours_are_distinct_and_do_not_depend_on_the_codebook_size() -> None:
    colours = palette(512)
    assert len(colours.unique(dim=0)) == 512
    assert torch.equal(palette(8192)[:512], colours)


def test_colours_are_those_of_the_hsv_wheel() -> None:
    code = 7
    hue, saturation, value = (
        code * 0.6180339887498949 % 1,
        0.35 + 0.65 * (code * 3**0.5 % 1),
        0.45 + 0.55 * (code * 2**0.5 % 1),
    )
    expected = [round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value)]
    assert palette(8)[code].tolist() == expected


def test_a_code_map_paints_each_square_in_its_codes_colour() -> None:
    codes = torch.tensor([[[0, 1, 2], [3, 4, 0]]])
    painted = code_map(codes, 5, (8, 12))
    assert painted.shape == (1, 3, 8, 12)
    assert painted.dtype == torch.uint8
    for row in range(2):
        for column in range(3):
            square = painted[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(square, palette(5)[codes[0, row, column]][:, None, None].expand(3, 4, 4))


def test_a_strip_holds_the_original_the_reconstruction_and_the_map() -> None:
    pixels, codes = torch.rand(2, 3, 8, 8), torch.randint(0, 5, (2, 2, 2))
    short, long = strip(pixels, codes, 5), strip(pixels, codes, 5, torch.zeros(2, 3, 4, 4))
    assert short.shape == (2, 3, 8, 18)
    assert long.shape == (2, 3, 8, 28)
    assert torch.equal(short[..., :8], (pixels * 255).round().to(torch.uint8))
    assert torch.equal(short[..., 8:10], torch.full((2, 3, 8, 2), 255, dtype=torch.uint8))
    assert not long[..., 10:18].any()
    assert torch.equal(long[..., 20:], code_map(codes, 5, (8, 8)))
