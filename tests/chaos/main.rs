//! The chaos suite: the storm against two replicas as real processes, under
//! faults that the storm does not make itself.
//!
//! `cargo test` runs each scenario for a few seconds; `CHAOS_MINUTES` spreads
//! another time over them. At the end stands a table, and the exit code is not 0
//! if a scenario has a count other than 0, if its fault did not happen, if the
//! history of a key is not that of a register that is written once, if the captures
//! and refunds of a charge have no order that explains their answers, or if a
//! request was told anything but 200, 402, 422, 409 or 503, or 400 for a change
//! that the charge does not allow.
//!
//! `CHAOS_SEED` plays the customers and the storm's own faults of another run
//! again; when which fault meets which request is the machine's doing.

mod history;
mod scenarios;
#[path = "../support/mod.rs"]
#[expect(
    dead_code,
    reason = "shared with the promises, which use the rest of it"
)]
mod support;

use std::{process::ExitCode, sync::Arc, time::Duration};

use scenarios::{Outcome, Row, SCENARIOS};
use support::postgres::Cluster;

/// How long one scenario lasts where nothing else is asked for.
const SHORT: Duration = Duration::from_secs(6);

fn main() -> ExitCode {
    // As the other tests' harness is asked: which tests there are, and which to run.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // None is ignored: a runner that asks for those gets nothing.
    let ignored = arguments.iter().any(|argument| argument == "--ignored");
    let filters: Vec<_> = arguments
        .iter()
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let chosen: Vec<_> = SCENARIOS
        .iter()
        .filter(|(name, _)| {
            let asked_for =
                filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
            asked_for && !ignored
        })
        .collect();
    if arguments.iter().any(|argument| argument == "--list") {
        for (name, _) in chosen {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let each = setting("CHAOS_MINUTES").map_or(SHORT, |minutes| {
        let minutes: f64 = minutes
            .parse()
            .expect("CHAOS_MINUTES is a number of minutes");
        Duration::from_secs_f64(minutes * 60.0) / u32::try_from(chosen.len().max(1)).unwrap()
    });

    let seed = setting("CHAOS_SEED").map_or_else(
        || rand::random::<u32>().into(),
        |seed| seed.parse().expect("CHAOS_SEED is a number"),
    );
    scenarios::start_with_seed(seed);
    eprintln!("chaos: CHAOS_SEED={seed}");

    history::check_the_checker();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cluster = Arc::new(runtime.block_on(Cluster::start("chaos")));
    let (mut rows, mut failed) = (Vec::new(), 0);
    for (name, scenario) in chosen {
        eprintln!("chaos: {name}");
        let outcome =
            runtime.block_on(async { tokio::spawn(scenario(Arc::clone(&cluster), each)).await });
        let outcome =
            outcome.unwrap_or_else(|end| Outcome::Failed(format!("it ended early: {end}")));
        if let Outcome::Ran(row) = &outcome
            && let Err(why) = row.verdict()
        {
            eprintln!("chaos: {name}: {why}");
            failed += 1;
        }
        if let Outcome::Failed(why) = &outcome {
            eprintln!("chaos: {name}: {why}");
            failed += 1;
        }
        rows.push((*name, outcome));
    }
    print(&rows);
    let skipped = rows
        .iter()
        .filter(|(_, outcome)| matches!(outcome, Outcome::NotHere(_)))
        .count();
    println!(
        "\n{} passed, {failed} failed, {skipped} skipped",
        rows.len() - failed - skipped
    );
    if failed > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn print(rows: &[(&str, Outcome)]) {
    println!(
        "\n| scenario | seconds | faults | requests | told 409 or 503 | broken off | charges | changes | double | lost | miscounted | differing | unanswered | tables | history |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    );
    let mut sum = Row::default();
    for (name, outcome) in rows {
        match outcome {
            Outcome::Ran(row) => {
                sum.add(row);
                println!("| {name} | {row} |");
            }
            Outcome::NotHere(why) => {
                println!("| {name} | not possible here: {why} | | | | | | | | | | | | | |");
            }
            Outcome::Failed(why) => {
                println!("| {name} | failed: {why} | | | | | | | | | | | | | |");
            }
        }
    }
    println!("| all | {sum} |");
}
