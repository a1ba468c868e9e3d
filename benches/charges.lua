-- What wrk sends. Each key has 33 digits, like those of the .sql files.
--
--   wrk -s benches/charges.lua URL -- fresh SEED      keys all different
--   wrk -s benches/charges.lua URL -- replay SEED     1,000 keys, the same in every run
--   wrk -s benches/charges.lua URL -- refund SEED     1 of a charge that was filled in
--   wrk -s benches/charges.lua URL -- capture SEED    each of those charges once
--   wrk -s benches/charges.lua URL -- retrieve SEED   one of those charges

local threads = 0

function setup(thread)
    threads = threads + 1
    thread:set("thread", threads)
end

-- The id of a charge that scripts/bench has filled in.
local function filled_in(n)
    return string.format("ch_00000000000070008000%012d", n)
end

function init(args)
    kind, count = args[1], 0
    math.randomseed(tonumber(args[2]) + thread)
    local method, path, body = "POST", "/v1/charges", '{"amount":5000,"currency":"usd","customer":"cus_ABC123"}'
    if kind == "refund" then
        path, body = "/v1/refunds", '{"charge":"' .. filled_in(0):gsub("0000$", "CHRG") .. '","amount":1}'
    elseif kind == "capture" then
        path, body = "/v1/charges/CHARGE/capture", "{}"
    elseif kind == "retrieve" then
        method, path, body = "GET", "/v1/charges/CHARGE", nil
    end
    template = wrk.format(method, path, {
        ["Authorization"] = "Bearer " .. os.getenv("API_KEY"),
        ["Content-Type"] = "application/json",
        ["Idempotency-Key"] = kind ~= "retrieve" and "KEY" or nil,
    }, body)
    -- As long as an id, for the sake of Content-Length.
    template = template:gsub("ch_%d+CHRG", "CHARGE")
    if kind == "fresh" or kind == "replay" then
        head, tail = template:match("^(.*)KEY(.*)$")
    end
end

function request()
    -- Random, so that they do not go into the index side by side; thread and
    -- count make them unique.
    count = count + 1
    local key
    if kind == "replay" then
        key = string.format("%033d", math.random(1000))
    else
        key = string.format("%08d%08d-%04d%012d",
            math.random(99999999), math.random(99999999), thread, count)
    end
    if head then
        return head .. key .. tail
    end
    local n = kind == "capture" and count * 2 + thread or math.random(FILLED)
    return (template:gsub("CHARGE", filled_in(n)):gsub("KEY", key))
end

FILLED = 100000

function done(summary, latency)
    local e = summary.errors
    print(string.format(
        'RESULT {"count": %d, "us": %d, "errors": %d, "p50_us": %d, "p99_us": %d}',
        summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout,
        latency:percentile(50), latency:percentile(99)))
end
