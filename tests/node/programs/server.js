// Counts requests and answers: {"token", "requests", "sum" of 16 MiB that it holds}.
const crypto = require("crypto");
const http = require("http");

const token = crypto.randomBytes(16).toString("hex");
const content = crypto.randomBytes(16 << 20);
let requests = 0;

const server = http.createServer((request, response) => {
  requests += 1;
  const sum = crypto.createHash("sha256").update(content).digest("hex");
  response.writeHead(200, { Connection: "close" });
  response.end(JSON.stringify({ token, requests, sum }));
});
server.listen(0, "127.0.0.1", () => console.log("port " + server.address().port));
