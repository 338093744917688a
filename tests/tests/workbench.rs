//! Work that people do in a guest, in a Debian with a compiler: several vCPUs compile, calculate and hold under stress.

use std::time::Duration;

use strata_tests::stress::{self, Outcome};
use strata_tests::{Need, Strata, WORKBENCH, ready};

/// How long one run may take, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// Threads that count primes, each taking the next range from a counter that they share.
const PROGRAM: &str = r#"
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

int is_prime(unsigned n);

static atomic_uint next, primes;

static void *count(void *nothing) {
    for (;;) {
        unsigned from = atomic_fetch_add(&next, 1000);
        if (from >= 1000000) return nothing;
        for (unsigned n = from; n < from + 1000; n++)
            if (is_prime(n)) atomic_fetch_add(&primes, 1);
    }
}

int main(int argc, char **argv) {
    pthread_t threads[64];
    int threads_wanted = atoi(argv[1]);
    for (int i = 0; i < threads_wanted; i++)
        if (pthread_create(&threads[i], 0, count, 0)) abort();
    for (int i = 0; i < threads_wanted; i++)
        pthread_join(threads[i], 0);
    printf("%u\n", primes);
}
"#;

const PRIME: &str = r#"
int is_prime(unsigned n) {
    for (unsigned i = 2; i * i <= n; i++)
        if (n % i == 0) return 0;
    return n > 1;
}
"#;

/// Compiles both files at once, links them, and runs the program with a thread for each CPU.
fn compiles_and_calculates(cpus: u32) {
    if !ready(Need::Workbench) {
        return;
    }
    let script = format!(
        "nproc; cd /root; cat >main.c <<'END'\n{PROGRAM}\nEND\ncat >prime.c <<'END'\n{PRIME}\nEND\n\
         for file in main prime; do gcc -O2 -Wall -Werror -pthread -c $file.c & done; wait\n\
         gcc -pthread -o count main.o prime.o && ./count $(nproc)\n"
    );
    let run = Strata::new()
        .args(["run", WORKBENCH, "--cpus", &cpus.to_string(), "--"])
        .args(["sh", "-c", &script])
        .timeout(PATIENCE)
        .run()
        .expect(0);
    assert_eq!(run.text(), format!("{cpus}\n78498\n"), "{}", run.stderr);
}

#[test]
fn one_cpu_compiles_and_calculates() {
    compiles_and_calculates(1);
}

#[test]
fn two_cpus_compile_and_calculate() {
    compiles_and_calculates(2);
}

#[test]
fn four_cpus_compile_and_calculate() {
    compiles_and_calculates(4);
}

/// A slice of the campaign `stress`.
#[test]
fn nothing_goes_wrong_under_stress() {
    if !ready(Need::Workbench) {
        return;
    }
    let run = Strata::new()
        .args(["run", WORKBENCH, "--cpus", "2", "--"])
        .args(["sh", "-c", &stress::script(1, 1)])
        .timeout(PATIENCE)
        .run()
        .expect(0);
    let outcome = Outcome::read(&run.text());
    assert!(
        outcome.wrong.is_empty(),
        "{:?}\n{}",
        outcome.wrong,
        run.text()
    );
    assert!(outcome.operations > 1000, "{}", run.text());
}
