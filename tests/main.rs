//! The promises, one file each, over the real router and a real PostgreSQL.

#[expect(
    dead_code,
    reason = "shared with the chaos suite, which uses the rest of it"
)]
mod support;

mod accounts_are_apart;
mod batches;
mod changes;
mod client;
mod commands;
mod contract;
mod durable;
mod errors;
mod faults_burn_no_key;
mod guard;
mod handbook;
mod in_flight;
mod inbound;
mod keyless;
mod layer;
mod lists;
mod lookup;
mod one_charge_per_key;
mod other_request_refused;
mod overload;
mod plans;
mod pooler;
mod purge;
mod regressions;
mod retired_currency;
mod same_answer;
mod sdk;
mod standby;
mod storm;
mod wire;
