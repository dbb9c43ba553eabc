// Asks the server of this page: about a file through /v1/chat/completions, about the webcam through a WebSocket.

const $ = (id) => document.getElementById(id);
const THUMBNAILS = 32;
let model = null;
let file = null;
let running = null; // an AbortController while an answer is being written
let live = null; // a LiveSession

// --- the server ---

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function checked(response) {
  if (response.ok) return response;
  if (response.status === 401) $("key-form").hidden = false;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered with ${response.status}`);
}

async function loadModel() {
  const response = await checked(await fetch("v1/models", { headers: headers() }));
  [model] = (await response.json()).data;
  $("model").textContent = model.id;
  $("frames").value = model.storm.num_frames;
  $("frames").max = model.storm.max_frames;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// --- what is shown ---

function show(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

function setRunning(controller) {
  running = controller;
  $("ask").disabled = Boolean(controller);
  $("stop").disabled = !controller;
}

function seconds(since) {
  return `${((performance.now() - since) / 1000).toFixed(2)} s`;
}

function sizeOf(blob) {
  return blob.size < 1e6 ? `${Math.ceil(blob.size / 1e3)} kB` : `${(blob.size / 1e6).toFixed(1)} MB`;
}

// Draws the frames that the model has seen, by seeking in a copy of the video.
async function showFrames(times) {
  const strip = $("seen");
  strip.replaceChildren();
  const copy = document.createElement("video");
  copy.muted = true;
  copy.src = $("preview").src;
  const isPlayable = await new Promise((resolve) => {
    copy.onloadeddata = () => resolve(true);
    copy.onerror = () => resolve(false); // not every format that the server reads
  });
  const step = Math.max(1, Math.ceil(times.length / THUMBNAILS));
  for (let n = 0; n < times.length; n += step) {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    canvas.height = 90;
    canvas.width = isPlayable ? Math.round((90 * copy.videoWidth) / copy.videoHeight) : 90;
    const caption = document.createElement("figcaption");
    caption.textContent = `${times[n].toFixed(2)} s`;
    figure.append(canvas, caption);
    strip.append(figure);
    if (!isPlayable) continue;
    await new Promise((resolve) => {
      copy.onseeked = resolve;
      copy.currentTime = Math.min(times[n] + 0.001, copy.duration);
    });
    canvas.getContext("2d").drawImage(copy, 0, 0, canvas.width, canvas.height);
  }
}

// --- a file ---

function choose(chosen) {
  if (!chosen) return;
  file = chosen;
  const isImage = file.type.startsWith("image/") && file.type !== "image/gif";
  const url = URL.createObjectURL(file);
  $("drop-text").textContent = `${file.name} (${sizeOf(file)}): choose another`;
  $("drop").classList.add("chosen");
  $("preview").hidden = isImage;
  $("picture").hidden = !isImage;
  $(isImage ? "picture" : "preview").src = url;
  $("seen").replaceChildren();
  show($("error"), "");
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${blob.name ?? "the file"} cannot be read`));
    reader.readAsDataURL(blob);
  });
}

async function part() {
  const content = (await dataUrl(file)).split(",", 2)[1];
  if ($("preview").hidden) return { type: "image_url", image_url: { url: `data:${file.type};base64,${content}` } };
  const kind = file.type.startsWith("video/") ? file.type : "video/mp4";
  const url = `data:${kind};base64,${content}`;
  return { type: "video_url", video_url: { url, num_frames: Number($("frames").value) || 1 } };
}

async function askFile(question) {
  const controller = new AbortController();
  setRunning(controller);
  const began = performance.now();
  $("stats").textContent = "reading the file";
  let first = "";
  try {
    const content = [...(file ? [await part()] : []), { type: "text", text: question }];
    const compression = $("compression").value;
    const body = {
      model: model.id,
      messages: [{ role: "user", content }],
      stream: true,
      stream_options: { include_usage: true },
      ...(compression && { storm: JSON.parse(compression) }),
    };
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(body),
      signal: controller.signal,
    });
    for await (const event of events(await checked(response))) {
      const video = event.storm?.media?.find((medium) => medium.kind === "video");
      if (video) showFrames(video.times);
      const delta = event.choices[0]?.delta?.content;
      if (delta) {
        first ||= seconds(began);
        $("answer").textContent += delta;
        $("stats").textContent = `first token after ${first}`;
      }
      if (event.usage) {
        const { prompt_tokens, completion_tokens, prompt_tokens_details } = event.usage;
        $("stats").textContent =
          `${prompt_tokens_details.multimodal_tokens} visual of ${prompt_tokens} tokens, ` +
          `first token after ${first || "-"}, ${completion_tokens} tokens in ${seconds(began)}`;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") $("stats").textContent = `stopped after ${seconds(began)}`;
    else {
      show($("error"), error.message);
      $("stats").textContent = "";
    }
  } finally {
    setRunning(null);
  }
}

// --- the webcam ---

class LiveSession {
  constructor(stream, fps) {
    this.camera = stream;
    this.sent = 0;
    this.began = performance.now();
    const address = new URL("v1/video/chat/stream", document.baseURI);
    address.protocol = address.protocol.replace("http", "ws");
    this.socket = new WebSocket(address);
    this.socket.onopen = () => {
      this.send({ type: "session.config", fps: 0, api_key: $("key").value });
      this.timer = setInterval(() => this.frame(), 1000 / fps);
    };
    this.socket.onmessage = (message) => this.receive(JSON.parse(message.data));
    this.socket.onclose = () => this.close();
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  async frame() {
    const video = $("camera");
    if (!video.videoWidth || this.isBusy) return;
    this.isBusy = true; // frames must not overtake each other
    const time = (performance.now() - this.began) / 1000;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.85));
    this.send({ type: "video.frame", data: (await dataUrl(blob)).split(",", 2)[1], time });
    this.isBusy = false;
    this.sent += 1;
    $("live-stats").textContent = `${this.sent} frames in ${time.toFixed(0)} s`;
  }

  ask(question) {
    setRunning({ abort: () => this.close() });
    this.send({ type: "video.query", text: question });
  }

  receive(message) {
    if (message.type === "response.text.delta") $("answer").textContent += message.delta;
    if (message.type === "response.text.done") {
      const { visual_tokens, used, dropped } = message.stats;
      $("stats").textContent =
        `${used} frames (${dropped} dropped), ${visual_tokens} visual tokens, first token after ` +
        `${message.first_token_seconds.toFixed(2)} s, ${message.seconds.toFixed(2)} s in all`;
      setRunning(null);
    }
    if (message.type === "error") {
      if (message.error.code === 401) $("key-form").hidden = false;
      show($("error"), message.error.message);
      setRunning(null);
    }
  }

  close() {
    clearInterval(this.timer);
    this.camera.getTracks().forEach((track) => track.stop());
    this.socket.close();
    $("start").textContent = "Start the camera";
    if (live === this) live = null;
    setRunning(null);
  }
}

async function startOrStop() {
  if (live) return live.close();
  show($("error"), "");
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: true });
    $("camera").srcObject = stream;
    await $("camera").play();
    live = new LiveSession(stream, Number($("fps").value) || 1);
    $("start").textContent = "Stop the camera";
  } catch (error) {
    show($("error"), `the camera cannot be used: ${error.message}`);
  }
}

// --- controls ---

function select(tab) {
  for (const each of document.querySelectorAll("[role=tab]")) {
    const isSelected = each === tab;
    each.setAttribute("aria-selected", isSelected);
    each.tabIndex = isSelected ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = !isSelected;
  }
  tab.focus();
}

function isLive() {
  return !$("live-panel").hidden;
}

$("question-form").onsubmit = async (event) => {
  event.preventDefault();
  if (running) return;
  show($("error"), "");
  $("answer").textContent = $("stats").textContent = "";
  const question = $("question").value.trim() || $("question").placeholder;
  try {
    if (!model) await loadModel();
  } catch (error) {
    return show($("error"), error.message);
  }
  if (!isLive()) return askFile(question);
  if (!live) return show($("error"), "start the camera first");
  live.ask(question);
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("question-form").requestSubmit();
  }
};
$("stop").onclick = () => running?.abort();
$("start").onclick = startOrStop;
$("file").onchange = () => choose($("file").files[0]);
$("drop").ondragover = (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
};
$("drop").ondragleave = () => $("drop").classList.remove("over");
$("drop").ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  choose(event.dataTransfer.files[0]);
};
for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.onclick = () => select(tab);
  tab.onkeydown = (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    select(tab === $("tab-file") ? $("tab-live") : $("tab-file"));
  };
}
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  start();
};

function start() {
  loadModel().then(
    () => show($("error"), ""),
    (error) => show($("error"), error.message),
  );
}
start();
