-- wrk: POSTs of 2 KB, sessions in turn; the figures as one line of JSON at the end.
local path = os.getenv("GATEWAY_PATH")
local words = string.rep("word ", 380)
local bodies = {
  ["/generate/"] = '{"prompts":["' .. words .. '"],"n":1,"max_tokens":1024,"logprobs":0}',
  ["/v1/completions"] = '{"model":"m","prompt":"' .. words .. '","max_tokens":1024}',
  ["/v1/chat/completions"] = '{"model":"m","messages":[{"role":"user","content":"' .. words .. '"}],"max_tokens":1024}',
}
local turn = 0
wrk.headers["content-type"] = "application/json"

request = function()
  turn = turn + 1
  wrk.headers["x-session-id"] = "session-" .. (turn % 512)
  return wrk.format("POST", path, nil, bodies[path])
end

done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\n{"rate": %f, "p50": %f, "p99": %f, "errors": %d}\n', summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, e.status + e.connect + e.read + e.write + e.timeout))
end
