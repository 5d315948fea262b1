// SPDX-License-Identifier: GPL-2.0

//! Whatever fails and whenever: the image is one whole epoch's (S4), every committed epoch is in it
//! (S7), the guest runs, and an end in good order causes no take-over.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::model::{flaky, until, Copy, Failure, Model, Random, Toy};
use crate::peer::stream::lock;
use crate::primary::protect::{self, introduce, Parts, Plan};
use crate::report::Report;
use crate::standby::serve::{self as standby, serve, Held, Offer};
use remus_core::uapi::ram::PAGE_SIZE;

const PAGES: usize = 60;
const TIMEOUT: Duration = Duration::from_millis(500);

struct Outcome {
    primary: protect::End,
    standby: standby::End,
    held: Held,
    image: Copy,
    model: Model,
    saved: Vec<u64>,
    running: bool,
    /// When the standby let go of the stream.
    left: Instant,
}

fn plan() -> Plan {
    Plan {
        domain: "toy".into(),
        memory: (PAGES * PAGE_SIZE) as u64,
        generation: 1,
        interval: Duration::from_millis(5),
        timeout: TIMEOUT,
        depth: 3,
    }
}

/// Runs both sides until both have ended. `arrange` may make something fail; `act` runs meanwhile.
fn run(
    seed: u64,
    connect: impl FnOnce(&TcpListener) -> TcpStream,
    arrange: impl FnOnce(&mut Toy, &Model),
    act: impl FnOnce(&Model, &AtomicBool, &AtomicBool),
) -> Outcome {
    let mut toy = Toy::new(PAGES, seed);
    let model = Model::new(toy.look());
    arrange(&mut toy, &model);
    let (saved, running) = (Arc::clone(&toy.saved), Arc::clone(&toy.running));
    let stops = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = connect(&listener);
    let (far, _) = listener.accept().unwrap();
    let stop = Arc::clone(&stops[1]);
    let receiving = thread::spawn(move || {
        let offer = Offer {
            domain: "toy".into(),
            memory: plan().memory,
            timeout: TIMEOUT,
        };
        let (mut held, mut image) = (Held::default(), Copy(vec![0; PAGES * PAGE_SIZE]));
        let end = serve(
            far,
            &offer,
            &mut held,
            &mut image,
            &Report::default(),
            &stop,
        );
        (end, held, image, Instant::now())
    });
    let kernel = model.clone();
    let stop = Arc::clone(&stops[0]);
    let protecting = thread::spawn(move || {
        let link = match introduce(&plan(), &near) {
            Ok(link) => link,
            Err(e) => return protect::End::Failed(e),
        };
        drop(near);
        let parts = Parts {
            guest: Box::new(toy),
            sealer: Box::new(kernel.clone()),
            committer: Box::new(kernel.clone()),
            pages: Box::new(kernel),
            report: Report::default(),
            stop,
        };
        protect::run(&plan(), parts, link)
    });
    act(&model, &stops[0], &stops[1]);
    let primary = protecting.join().unwrap();
    let running = running.load(Ordering::SeqCst);
    let (standby, held, image, left) = receiving.join().unwrap();
    let saved = lock(&saved).clone();
    Outcome {
        primary,
        standby,
        held,
        image,
        model,
        saved,
        running,
        left,
    }
}

/// What must hold however it ended.
fn check(o: &Outcome) {
    assert!(o.running, "the guest was left paused");
    let book = lock(&o.model.book);
    let committed = book.commits.last().copied().unwrap_or(0);
    assert!(
        committed <= o.held.epoch,
        "S7: {committed} is committed, {} held",
        o.held.epoch
    );
    if o.held.epoch > 0 {
        assert!(
            o.image.0 == book.snapshots[&o.held.epoch],
            "S4: torn at {}",
            o.held.epoch
        );
        let state = u64::from_le_bytes(o.held.state[..].try_into().unwrap());
        assert_eq!(
            state,
            o.saved[o.held.epoch as usize - 1],
            "S4: state of another epoch"
        );
    }
    assert!(book.commits.windows(2).all(|w| w[0] < w[1]));
}

fn direct(listener: &TcpListener) -> TcpStream {
    TcpStream::connect(listener.local_addr().unwrap()).unwrap()
}

fn commits(model: &Model) -> usize {
    lock(&model.book).commits.len()
}

#[test]
fn connection_dies_anywhere() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut took_over, mut deep) = (0, 0);
    for round in 0..40 {
        let failure = [Failure::Close, Failure::Stall, Failure::Flip][round % 3];
        // The first epoch has some 250 kB, each of the others up to that.
        let budget = 300 + random.below(1_500_000);
        let o = run(
            random.next(),
            |l| flaky(l, budget, failure),
            |_, _| {},
            |_, _, _| {},
        );
        check(&o);
        assert!(
            !matches!(o.primary, protect::End::Asked),
            "{failure:?} at {budget}"
        );
        match o.standby {
            standby::End::Dead(..) => took_over += usize::from(o.held.epoch > 0),
            // Damaged before it was welcome.
            standby::End::Refused(_) => {}
            other => panic!("{failure:?} at {budget}: {other:?}"),
        }
        deep = deep.max(o.held.epoch);
    }
    assert!(took_over > 20 && deep > 3, "{took_over} {deep}");
}

#[test]
fn ended_in_good_order() {
    let o = run(
        1,
        direct,
        |_, _| {},
        |model, stop, _| {
            until("five commits", Duration::from_secs(10), || {
                commits(model) >= 5
            });
            stop.store(true, Ordering::SeqCst);
        },
    );
    check(&o);
    assert!(matches!(o.primary, protect::End::Asked), "{:?}", o.primary);
    assert!(matches!(o.standby, standby::End::Bye(_)), "{:?}", o.standby);
}

#[test]
fn standby_ended_in_good_order() {
    let o = run(
        2,
        direct,
        |_, _| {},
        |model, _, stop| {
            until("five commits", Duration::from_secs(10), || {
                commits(model) >= 5
            });
            stop.store(true, Ordering::SeqCst);
        },
    );
    check(&o);
    assert!(
        o.primary.to_string().contains("good order"),
        "{:?}",
        o.primary
    );
    assert!(matches!(o.standby, standby::End::Asked), "{:?}", o.standby);
}

#[test]
fn primary_fails_within() {
    for what in 0..4 {
        let o = run(
            3,
            direct,
            |toy, model| match what {
                0 => toy.saves = 5,
                1 => model.seals.store(5, Ordering::SeqCst),
                2 => model.reads.store(25, Ordering::SeqCst),
                _ => model.commits.store(5, Ordering::SeqCst),
            },
            |_, _, _| {},
        );
        check(&o);
        assert!(
            o.primary.to_string().contains("made to fail"),
            "{:?}",
            o.primary
        );
        assert!(
            matches!(o.standby, standby::End::Dead(..)),
            "{:?}",
            o.standby
        );
        assert!(o.held.epoch >= 1);
    }
}

#[test]
fn strangers_are_refused() {
    for change in 0..3 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = direct(&listener);
        let (far, _) = listener.accept().unwrap();
        let mut plan = plan();
        match change {
            0 => plan.domain = "other".into(),
            1 => plan.memory *= 2,
            _ => std::io::Write::write_all(
                &mut &near,
                b"GET / HTTP/1.1\r\nHost: standby\r\n\r\n____",
            )
            .unwrap(),
        }
        let serving = thread::spawn(move || {
            let offer = Offer {
                domain: "toy".into(),
                memory: 4096,
                timeout: TIMEOUT,
            };
            let (mut held, mut image) = (Held::default(), Copy(Vec::new()));
            let stop = Arc::default();
            serve(
                far,
                &offer,
                &mut held,
                &mut image,
                &Report::default(),
                &stop,
            )
        });
        let told = introduce(&plan, &near).err().unwrap();
        let told = format!("{told:#}");
        let why = [
            "not for other",
            "memory on the primary",
            "does not speak the Remus protocol",
        ];
        assert!(told.contains(why[change]), "{told}");
        let end = serving.join().unwrap();
        assert!(matches!(&end, standby::End::Refused(e) if format!("{e:#}").contains(why[change])));
    }
}

/// S6: an acknowledgement that the primary comes to read only after the standby has let go of it
/// releases nothing, as the standby may have taken over.
#[test]
fn late_acknowledgements_release_nothing() {
    let o = run(
        4,
        direct,
        |_, _| {},
        |model, _, stop| {
            let patience = Duration::from_secs(10);
            until("five commits", patience, || commits(model) >= 5);
            // The primary is held up, and meanwhile acknowledgements of up to three epochs come.
            model.commit_takes.store(1000, Ordering::SeqCst);
            let now = commits(model);
            until("the slow commit", patience, || commits(model) > now);
            thread::sleep(Duration::from_millis(150));
            model.commit_takes.store(0, Ordering::SeqCst);
            stop.store(true, Ordering::SeqCst);
        },
    );
    check(&o);
    let book = lock(&o.model.book);
    assert!(
        *book.commits.last().unwrap() < o.held.epoch,
        "nothing was late"
    );
    assert!(
        book.begun.iter().all(|b| *b < o.left),
        "committed after the standby had left"
    );
}

/// A primary that is held up goes on when it hears of the standby again.
#[test]
fn lease_is_renewed() {
    let o = run(
        5,
        direct,
        |_, _| {},
        |model, stop, _| {
            let patience = Duration::from_secs(20);
            until("five commits", patience, || commits(model) >= 5);
            model
                .commit_takes
                .store(2 * TIMEOUT.as_millis() as u64, Ordering::SeqCst);
            until("slow commits", patience, || commits(model) >= 8);
            model.commit_takes.store(0, Ordering::SeqCst);
            until("five more", patience, || commits(model) >= 13);
            stop.store(true, Ordering::SeqCst);
        },
    );
    check(&o);
    assert!(matches!(o.primary, protect::End::Asked), "{:?}", o.primary);
}
