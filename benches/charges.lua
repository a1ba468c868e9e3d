-- What wrk sends. Each key has 33 digits, like those of the .sql files.
--
--   wrk -s benches/charges.lua URL -- fresh SEED     keys all different
--   wrk -s benches/charges.lua URL -- replay SEED    1,000 keys, the same in every run

local threads = 0

function setup(thread)
    threads = threads + 1
    thread:set("thread", threads)
end

function init(args)
    replay, count = args[1] == "replay", 0
    math.randomseed(tonumber(args[2]) + thread)
    local request = wrk.format("POST", "/v1/charges", {
        ["Authorization"] = "Bearer " .. os.getenv("API_KEY"),
        ["Content-Type"] = "application/json",
        ["Idempotency-Key"] = "KEY",
    }, '{"amount":5000,"currency":"usd","customer":"cus_ABC123"}')
    head, tail = request:match("^(.*)KEY(.*)$")
end

function request()
    local key
    if replay then
        key = string.format("%033d", math.random(1000))
    else
        -- Random, so that they do not go into the index side by side; thread
        -- and count make them unique.
        count = count + 1
        key = string.format("%08d%08d-%04d%012d",
            math.random(99999999), math.random(99999999), thread, count)
    end
    return head .. key .. tail
end

function done(summary, latency)
    local e = summary.errors
    print(string.format(
        'RESULT {"count": %d, "us": %d, "errors": %d, "p50_us": %d, "p99_us": %d}',
        summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout,
        latency:percentile(50), latency:percentile(99)))
end
