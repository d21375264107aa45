// Puts the page together: one stream of news, handed to each part.

import { Admin } from "./admin.js";
import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { KeyDialog } from "./key.js";
import { Happenings } from "./happenings.js";
import { Heatmap } from "./heatmap.js";
import { Live } from "./live.js";
import { Processes } from "./processes.js";
import { Theme } from "./theme.js";
import { Tiles } from "./tiles.js";
import { Wires } from "./wires.js";
import { announce, byId, setText } from "./dom.js";

const STATES = {
  starting: "starting",
  serving: "serving",
  uncovered: "some experts have no copy that is up",
  draining: "draining",
  failed: "failed",
};

const api = new Api();
const heatmap = new Heatmap();
const tiles = new Tiles();
const happenings = new Happenings();
const wires = new Wires();
const admin = new Admin(api, { openKey: () => key.open() });
const processes = new Processes({ onMark: (shard) => heatmap.mark(shard), shardAction: (id) => admin.killButton(id) });
const live = new Live(api, { cluster, placement: (placement) => heatmap.placement(placement), beat, state });
const key = new KeyDialog(api, () => {
  live.restart();
  admin.refresh();
});
new Chat(api, { onDenied: () => key.open() });
new Theme((theme) => {
  heatmap.paint(theme);
  processes.paint(theme);
  wires.paint(theme);
});

function cluster(picture) {
  setText(byId("model"), picture.model);
  document.title = `${picture.model} · moe-cluster`;
  if (byId("state").dataset.state !== picture.state) announce(`The cluster is ${STATES[picture.state]}`);
  byId("state").dataset.state = picture.state;
  setText(byId("state-text"), STATES[picture.state] + (picture.reason ? `: ${picture.reason}` : ""));
  heatmap.shards(picture.shards);
  processes.cluster(picture);
  wires.cluster(picture);
  admin.cluster(picture);
  tiles.cluster(picture);
  happenings.show(picture.events);
}

function beat(news) {
  heatmap.beat(news);
  tiles.beat(news);
  processes.beat(news);
  wires.beat(news);
}

/** now: "live", "paused" or an error. */
function state(now) {
  const notice = byId("notice");
  if (typeof now === "string") {
    notice.hidden = true;
    return;
  }
  byId("state").dataset.state = "connecting";
  setText(byId("state-text"), now.status === 401 ? "a key is needed" : "no connection");
  setText(notice, now.status === 401 ? "This server asks for a key: give one with the button Key." : `No news of the cluster: ${now.message}`);
  notice.hidden = false;
}

live.restart();
admin.refresh();
