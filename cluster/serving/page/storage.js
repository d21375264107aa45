// What the browser keeps for this page. One that keeps no site data refuses even to be asked: then nothing is kept.

/** area: "localStorage", or "sessionStorage" until the tab is closed. */
export function kept(area, name) {
  try {
    return window[area].getItem(name);
  } catch {
    return null;
  }
}

/** value: null removes it. */
export function keep(area, name, value) {
  try {
    if (value === null) window[area].removeItem(name);
    else window[area].setItem(name, value);
  } catch {
    // it lasts as long as the page
  }
}
