// Puts the page together: who follows what is chosen, in this order.

import {followAddress} from "./address.js";
import {followInChips} from "./chips.js";
import {dark} from "./colors.js";
import {followSide} from "./compare.js";
import {followCounts} from "./counting.js";
import {followFiles, openFirst} from "./files.js";
import {followFocus} from "./focus.js";
import {followHint} from "./hint.js";
import {followKeys} from "./keys.js";
import {followInList} from "./list.js";
import {followInSights} from "./looks.js";
import {followInMap} from "./map.js";
import {followInPanels} from "./panels.js";
import {choose, now} from "./state.js";
import {followWhere} from "./where.js";

followAddress();
followSide();
followInChips();
followInList();
followInMap();
followInSights();
followInPanels();
followFiles();
followKeys();
followHint();
followCounts();
followWhere();
followFocus();

let resizing;
function again() {  // drawn for the window and the theme as they are now
  clearTimeout(resizing);
  resizing = setTimeout(() => { if (now.names.length) choose({}, {keep: true}); }, 150);
}
addEventListener("resize", again);
dark.addEventListener("change", again);

openFirst();
