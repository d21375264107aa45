// Colours of the heatmap: even steps of lightness in OKLab, from the card's ground to what catches the eye.
// Source: Björn Ottosson, "A perceptual color space for image processing" (OKLab).

const STEPS = 64;
const RAMPS = {
  light: { lightness: [0.955, 0.42], chroma: [0.012, 0.16], hue: [150, 282] },
  dark: { lightness: [0.27, 0.93], chroma: [0.02, 0.15], hue: [282, 105] },
};

/** sRGB, 0 to 255 each, of a lightness 0 to 1, a chroma and a hue in degrees. */
export function oklch(lightness, chroma, hue) {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((x) => {
    const bounded = Math.min(1, Math.max(0, x));
    return Math.round(255 * (bounded <= 0.0031308 ? 12.92 * bounded : 1.055 * bounded ** (1 / 2.4) - 0.055));
  });
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;
const between = ([from, to], share) => from + (to - from) * share;

/** Colours from nothing to most. theme: "light" or "dark". */
export function ramp(theme) {
  const { lightness, chroma, hue } = RAMPS[theme];
  return Array.from({ length: STEPS + 1 }, (_, step) => {
    const share = step / STEPS;
    return css(oklch(between(lightness, share), between(chroma, Math.min(1, 2 * share)), between(hue, share)));
  });
}

/** A shard's colour: hues far apart for neighbours. */
export function shardColour(theme, shard, lit = 1) {
  const hue = (25 + shard * 137.5) % 360;
  const lightness = theme === "light" ? between([0.86, 0.58], lit) : between([0.36, 0.74], lit);
  return css(oklch(lightness, between([0.05, 0.13], lit), hue));
}
