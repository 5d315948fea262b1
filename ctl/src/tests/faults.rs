// SPDX-License-Identifier: GPL-2.0-or-later

//! Whatever fails and whenever: the image is one whole epoch's (S4), every committed epoch is in it
//! (S7), the guest runs, and an end in good order causes no take-over.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::model::{flaky, until, Copy, Failure, Model, Patient, Random, Toy};
use crate::args::Loss;
use crate::host::events::Event;
use crate::host::kernel::Hearing;
use crate::peer::channel::{Channel, Way};
use crate::peer::door::Limits;
use crate::peer::stream::lock;
use crate::primary::keep::keep;
use crate::primary::link::introduce;
use crate::primary::pace::Pace;
use crate::primary::pipeline::Encoding;
use crate::primary::protect::{run, End, Parts, Plan};
use crate::report::live::{Ask, Order};
use crate::report::Report;
use crate::standby::caller::{Caller, Callers};
use crate::standby::serve::{self as standby, serve, Held, Offer};
use remus_core::uapi::ram::PAGE_SIZE;

const PAGES: usize = 60;
const TIMEOUT: Duration = Duration::from_millis(500);

/// How the standby ended.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    Refused(String),
    Bye,
    Asked,
    /// It would take over.
    Dead,
    Handover,
    Failed(String),
}

struct Outcome {
    primary: End,
    standby: Left,
    held: Held,
    image: Copy,
    model: Model,
    saved: Vec<u64>,
    running: bool,
    /// When the standby let go of the stream.
    left: Instant,
    /// How often a primary was served.
    served: usize,
}

/// What a test may touch while both sides run.
struct Hands<'a> {
    model: &'a Model,
    stop_primary: &'a AtomicBool,
    stop_standby: &'a AtomicBool,
    orders: &'a Sender<Order>,
    /// What the kernel tells the primary.
    events: &'a Sender<Event>,
    /// The primary has ended.
    ended: &'a AtomicBool,
}

/// Hears what a test says.
struct Ear(Receiver<Event>);

impl Hearing for Ear {
    fn hear(&mut self, patience: Duration) -> anyhow::Result<Option<Event>> {
        Ok(self.0.recv_timeout(patience).ok())
    }
}

fn plan() -> Plan {
    Plan {
        domain: "toy".into(),
        memory: (PAGES * PAGE_SIZE) as u64,
        generation: 1,
        run: 7,
        pace: Pace::Fixed(Duration::from_millis(5)),
        timeout: TIMEOUT,
        depth: 3,
        encoding: Encoding {
            encoders: 2,
            // Not for all pages.
            cache_bytes: 40 * PAGE_SIZE,
            raw: false,
        },
        copy_in_pause: false,
        disks: Vec::new(),
    }
}

fn offer() -> Offer {
    Offer {
        domain: "toy".into(),
        memory: plan().memory,
        timeout: TIMEOUT,
    }
}

fn callers() -> (Callers, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let callers = Callers::open(listener, Way::Plain, Limits::default(), Caller::meet).unwrap();
    (callers, address)
}

fn plain(stream: TcpStream) -> anyhow::Result<Channel> {
    Channel::connect(stream, &Way::Plain, TIMEOUT)
}

/// Serves primaries until the last one is dead, or has ended.
fn stand_by(
    callers: &Callers,
    stop: &AtomicBool,
    unable: bool,
) -> (Left, Held, Copy, Instant, usize) {
    let (mut held, mut image) = (Held::default(), Copy(vec![0; PAGES * PAGE_SIZE]));
    let (mut next, mut served) = (None, 0);
    let mut deadline = Instant::now() + Duration::from_secs(20);
    let left = loop {
        let patience = deadline.saturating_duration_since(Instant::now());
        let caller = match next.take() {
            Some(caller) => caller,
            None => match callers.next(patience) {
                Some((caller, _)) => Box::new(caller),
                None => break Left::Dead,
            },
        };
        let mut parts = standby::Parts {
            callers,
            image: &mut image,
            disks: None,
            machine: &mut Patient,
            report: &Report::default(),
            stop,
            tick: &|| {},
        };
        let end = serve(*caller, &offer(), &mut held, &mut parts);
        served += 1;
        match end {
            standby::End::Refused(e) => break Left::Refused(format!("{e:#}")),
            standby::End::Other(again) => {
                // What it had was not whole.
                assert_eq!(held.epoch, 0);
                (held, image) = (Held::default(), Copy(vec![0; PAGES * PAGE_SIZE]));
                next = Some(again);
            }
            standby::End::Bye(_) => break Left::Bye,
            standby::End::Asked => break Left::Asked,
            standby::End::Failed(e) => break Left::Failed(format!("{e:#}")),
            standby::End::Handover(primary) if unable => {
                primary.failed("no room");
                break Left::Failed("no room".into());
            }
            standby::End::Handover(primary) => {
                primary.resumed();
                break Left::Handover;
            }
            standby::End::Lost(lost) if lost.given_up => break Left::Dead,
            standby::End::Lost(lost) => {
                deadline = lost.heard + TIMEOUT;
                next = lost.again;
            }
        }
    };
    (left, held, image, Instant::now(), served)
}

/// Runs both sides until both have ended. `connect` makes the n-th connection; `arrange` may make
/// something fail; `act` runs meanwhile.
fn both(
    seed: u64,
    again: bool,
    connect: impl Fn(SocketAddr, usize) -> TcpStream + Send + 'static,
    arrange: impl FnOnce(&mut Plan, &mut Toy, &Model),
    act: impl FnOnce(&Hands<'_>),
) -> Outcome {
    let (mut plan, mut toy) = (plan(), Toy::new(PAGES, seed));
    let model = Model::new(toy.look());
    arrange(&mut plan, &mut toy, &model);
    let unable = model.unable.load(Ordering::SeqCst);
    let (saved, running) = (Arc::clone(&toy.saved), Arc::clone(&toy.running));
    let stops = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let (callers, address) = callers();
    let stop = Arc::clone(&stops[1]);
    let receiving = thread::spawn(move || stand_by(&callers, &stop, unable));
    let (kernel, stop) = (model.clone(), Arc::clone(&stops[0]));
    let (order, orders) = channel();
    // On output is tested with something that tells of it.
    let (events, hearing) = channel();
    let hearing: Option<Box<dyn Hearing>> = match plan.pace {
        Pace::OnOutput { .. } => Some(Box::new(Ear(hearing))),
        _ => None,
    };
    let ended = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&ended);
    let protecting = thread::spawn(move || {
        let mut count = 0;
        let mut connect = move || {
            count += 1;
            plain(connect(address, count - 1))
        };
        let link = match introduce(&plan, &mut connect) {
            Ok(link) => link,
            Err(e) => return End::Failed(e),
        };
        let mut parts = Parts {
            guest: Box::new(toy),
            sealer: Box::new(kernel.clone()),
            committer: Box::new(kernel.clone()),
            pages: Box::new(kernel),
            disks: None,
            hearing,
            report: Report::default(),
            orders,
            stop,
        };
        let mut pace = plan.pace;
        let end = if again {
            keep(&plan, &mut parts, &mut connect, link, Loss::Hold)
        } else {
            run(&plan, &mut parts, link, &mut pace)
        };
        over.store(true, Ordering::SeqCst);
        end
    });
    act(&Hands {
        model: &model,
        stop_primary: &stops[0],
        stop_standby: &stops[1],
        orders: &order,
        events: &events,
        ended: &ended,
    });
    let (standby, held, image, left, served) = receiving.join().unwrap();
    if again && standby == Left::Dead {
        // It finds no standby any more, and would look for one for ever.
        stops[0].store(true, Ordering::SeqCst);
    }
    let primary = protecting.join().unwrap();
    let running = running.load(Ordering::SeqCst);
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
        served,
    }
}

/// What must hold however it ended.
fn check(o: &Outcome) {
    let handed_over = matches!(o.primary, End::HandedOver);
    assert_eq!(o.running, !handed_over, "the guest was left paused");
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
        let nth = book.saves[&o.held.epoch];
        assert_eq!(state, o.saved[nth], "S4: state of another epoch");
    }
    assert!(book.commits.windows(2).all(|w| w[0] < w[1]));
}

fn direct(to: SocketAddr, _: usize) -> TcpStream {
    TcpStream::connect(to).unwrap()
}

fn commits(model: &Model) -> usize {
    lock(&model.book).commits.len()
}

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn connection_dies_anywhere() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut took_over, mut deep) = (0, 0);
    for round in 0..24 {
        let failure = [Failure::Close, Failure::Stall, Failure::Flip][round % 3];
        // The first copy has some 250 kB; what goes over the control stream is little.
        let (which, budget) = match round % 4 {
            0 => (0, 60 + random.below(1_000)),
            _ => (1, 60 + random.below(700_000)),
        };
        let o = both(
            random.next(),
            false,
            move |to, n| match n == which {
                true => flaky(to, budget, failure),
                false => direct(to, n),
            },
            |_, _, _| {},
            |_| {},
        );
        check(&o);
        assert!(
            !matches!(o.primary, End::Asked),
            "{failure:?} at {budget} of {which}"
        );
        match o.standby {
            Left::Dead => took_over += usize::from(o.held.epoch > 0),
            // Damaged before it was welcome.
            Left::Refused(_) => {}
            other => panic!("{failure:?} at {budget} of {which}: {other:?}"),
        }
        deep = deep.max(o.held.epoch);
    }
    assert!(took_over > 8 && deep > 3, "{took_over} {deep}");
}

/// The primary comes back, and goes on where it was, without sending all again.
#[test]
fn connection_comes_back() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for round in 0..9 {
        let failure = [Failure::Close, Failure::Flip, Failure::Close][round % 3];
        // Each connection has two streams; the first two lose the one or the other.
        let budgets = [(); 2].map(|()| 5_000 + random.below(500_000));
        let o = both(
            random.next(),
            true,
            move |to, n| match n {
                1 => flaky(to, budgets[0], failure),
                3 => flaky(to, budgets[1], failure),
                _ => direct(to, n),
            },
            |_, _, _| {},
            |hands| {
                until("200 epochs", 3 * PATIENCE, || {
                    assert!(!hands.ended.load(Ordering::SeqCst), "it has ended");
                    lock(&hands.model.book).commits.last().copied().unwrap_or(0) > 200
                });
                hands.stop_primary.store(true, Ordering::SeqCst);
            },
        );
        check(&o);
        assert!(matches!(o.primary, End::Asked), "{:?}", o.primary);
        assert_eq!(o.standby, Left::Bye);
        // One that comes back to an image that is not whole is served anew.
        assert!((3..=5).contains(&o.served), "{failure:?} {budgets:?}");
        // All of the memory was sent again only as long as nothing was held.
        let book = lock(&o.model.book);
        let first = book.commits[0];
        assert!(
            lock(&o.model.fulls).iter().all(|e| *e < first),
            "{budgets:?}"
        );
    }
}

#[test]
fn ended_in_good_order() {
    let o = both(
        1,
        false,
        direct,
        |_, _, _| {},
        |hands| {
            until("five commits", PATIENCE, || commits(hands.model) >= 5);
            hands.stop_primary.store(true, Ordering::SeqCst);
        },
    );
    check(&o);
    assert!(matches!(o.primary, End::Asked), "{:?}", o.primary);
    assert_eq!(o.standby, Left::Bye);
}

#[test]
fn standby_ended_in_good_order() {
    let o = both(
        2,
        false,
        direct,
        |_, _, _| {},
        |hands| {
            until("five commits", PATIENCE, || commits(hands.model) >= 5);
            hands.stop_standby.store(true, Ordering::SeqCst);
        },
    );
    check(&o);
    assert!(
        o.primary.to_string().contains("good order"),
        "{:?}",
        o.primary
    );
    assert_eq!(o.standby, Left::Asked);
}

#[test]
fn handed_over() {
    let o = both(
        3,
        false,
        direct,
        |_, _, _| {},
        |hands| {
            until("five commits", PATIENCE, || commits(hands.model) >= 5);
            let (reply, answer) = channel();
            let ask = Ask::Failover;
            hands.orders.send(Order { ask, reply }).unwrap();
            let answer = answer.recv_timeout(PATIENCE).unwrap();
            assert!(
                answer.as_ref().is_ok_and(|a| a.contains("on the standby")),
                "{answer:?}"
            );
        },
    );
    check(&o);
    assert!(matches!(o.primary, End::HandedOver), "{:?}", o.primary);
    assert_eq!(o.standby, Left::Handover);
    let book = lock(&o.model.book);
    assert_eq!(
        *book.commits.last().unwrap(),
        o.held.epoch,
        "nothing is lost"
    );
    assert_eq!(
        book.epochs.open(),
        o.held.epoch + 1,
        "and nothing came after"
    );
}

/// A standby that cannot resume what it is handed says so, and the guest goes on.
#[test]
fn handed_over_in_vain() {
    let o = both(
        10,
        false,
        direct,
        |_, _, model| model.unable.store(true, Ordering::SeqCst),
        |hands| {
            until("five commits", PATIENCE, || commits(hands.model) >= 5);
            let (reply, answer) = channel();
            let ask = Ask::Failover;
            hands.orders.send(Order { ask, reply }).unwrap();
            let told = answer.recv_timeout(PATIENCE).unwrap().unwrap_err();
            assert!(
                told.contains("no room") && told.contains("goes on here"),
                "{told}"
            );
        },
    );
    check(&o);
    assert!(matches!(o.primary, End::PeerLost(_)), "{:?}", o.primary);
}

/// A link that takes much longer than the timeout for an epoch is slow, not dead, and only so many
/// epochs wait for it.
#[test]
fn slow_link() {
    let o = both(
        11,
        false,
        |to, n| match n {
            1 => flaky(to, usize::MAX, Failure::Slow),
            _ => direct(to, n),
        },
        |plan, _, _| plan.encoding.raw = true,
        |hands| {
            let begin = Instant::now();
            let mut most = 0;
            until("six commits", 4 * PATIENCE, || {
                // Before the first one the passes of the first copy wait too.
                if commits(hands.model) >= 1 {
                    most = most.max(lock(&hands.model.book).epochs.sealed());
                }
                commits(hands.model) >= 6
            });
            assert!(begin.elapsed() > 2 * TIMEOUT, "it was not slow");
            assert!(most <= plan().depth as u64, "{most} epochs wait");
            hands.stop_primary.store(true, Ordering::SeqCst);
        },
    );
    check(&o);
    assert!(matches!(o.primary, End::Asked), "{:?}", o.primary);
    assert_eq!(o.standby, Left::Bye);
}

/// Pages that are copied while the guest stands still, and sent as they are: plain Remus.
#[test]
fn plain_remus() {
    let o = both(
        4,
        false,
        direct,
        |plan, _, _| {
            plan.copy_in_pause = true;
            plan.encoding.raw = true;
            plan.depth = 1;
        },
        |hands| {
            until("ten commits", PATIENCE, || commits(hands.model) >= 10);
            hands.stop_primary.store(true, Ordering::SeqCst);
        },
    );
    check(&o);
    assert_eq!(o.standby, Left::Bye);
}

#[test]
fn primary_fails_within() {
    for what in 0..4 {
        let o = both(
            5,
            false,
            direct,
            |_, toy, model| match what {
                0 => toy.saves = 5,
                1 => model.seals.store(8, Ordering::SeqCst),
                2 => model.reads.store(45, Ordering::SeqCst),
                _ => model.commits.store(5, Ordering::SeqCst),
            },
            |_| {},
        );
        check(&o);
        assert!(
            o.primary.to_string().contains("made to fail"),
            "{:?}",
            o.primary
        );
        assert_eq!(o.standby, Left::Dead);
        assert!(o.held.epoch >= 1);
    }
}

#[test]
fn strangers_are_refused() {
    for change in 0..3 {
        let (callers, address) = callers();
        let mut plan = plan();
        match change {
            0 => plan.domain = "other".into(),
            1 => plan.memory *= 2,
            _ => {}
        }
        let serving = thread::spawn(move || stand_by(&callers, &AtomicBool::new(false), false).0);
        let mut connect = move || {
            let near = direct(address, 0);
            if change == 2 {
                let rubbish = b"GET / HTTP/1.1\r\nHost: standby\r\n\r\n____";
                std::io::Write::write_all(&mut &near, rubbish)?;
            }
            plain(near)
        };
        let told = introduce(&plan, &mut connect).err().unwrap();
        let told = format!("{told:#}");
        let why = [
            "not for other",
            "memory on the primary",
            "does not speak the Remus protocol",
        ];
        assert!(told.contains(why[change]), "{told}");
        if change < 2 {
            assert!(matches!(serving.join().unwrap(), Left::Refused(e) if e.contains(why[change])));
        }
    }
}

/// S6: an acknowledgement that the primary comes to read only after the standby has let go of it
/// releases nothing, as the standby may have taken over.
#[test]
fn late_acknowledgements_release_nothing() {
    let o = both(
        6,
        false,
        direct,
        |_, _, _| {},
        |hands| {
            let model = hands.model;
            until("five commits", PATIENCE, || commits(model) >= 5);
            // The primary is held up, and meanwhile acknowledgements of up to three epochs come.
            model.commit_takes.store(1000, Ordering::SeqCst);
            let now = commits(model);
            until("the slow commit", PATIENCE, || commits(model) > now);
            thread::sleep(Duration::from_millis(150));
            model.commit_takes.store(0, Ordering::SeqCst);
            hands.stop_standby.store(true, Ordering::SeqCst);
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
    let o = both(
        7,
        false,
        direct,
        |_, _, _| {},
        |hands| {
            let model = hands.model;
            until("five commits", PATIENCE, || commits(model) >= 5);
            let slow = 2 * TIMEOUT.as_millis() as u64;
            model.commit_takes.store(slow, Ordering::SeqCst);
            until("slow commits", PATIENCE, || commits(model) >= 8);
            model.commit_takes.store(0, Ordering::SeqCst);
            until("five more", PATIENCE, || commits(model) >= 13);
            hands.stop_primary.store(true, Ordering::SeqCst);
        },
    );
    check(&o);
    assert!(matches!(o.primary, End::Asked), "{:?}", o.primary);
}

/// A primary that was told to continue alone does, and is protected again by the next standby.
#[test]
fn alone_until_a_standby_is_there() {
    let (toy, plan) = (Toy::new(PAGES, 8), plan());
    let model = Model::new(toy.look());
    let standby = || {
        let (callers, address) = callers();
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || stand_by(&callers, &seen, false));
        (address, stop, thread)
    };
    let (first, first_stop, first_thread) = standby();
    let at = Arc::new(std::sync::Mutex::new(first));
    let (stop, address) = (Arc::new(AtomicBool::new(false)), Arc::clone(&at));
    let (kernel, end) = (model.clone(), Arc::clone(&stop));
    let protecting = thread::spawn(move || {
        let mut connect = move || plain(TcpStream::connect(*lock(&address))?);
        let link = introduce(&plan, &mut connect).unwrap();
        let mut parts = Parts {
            guest: Box::new(toy),
            sealer: Box::new(kernel.clone()),
            committer: Box::new(kernel.clone()),
            pages: Box::new(kernel),
            disks: None,
            hearing: None,
            report: Report::default(),
            orders: channel().1,
            stop: end,
        };
        keep(&plan, &mut parts, &mut connect, link, Loss::Continue)
    });
    until("five commits", PATIENCE, || commits(&model) >= 5);
    assert!(!lock(&model.book).passing);
    first_stop.store(true, Ordering::SeqCst);
    assert_eq!(first_thread.join().unwrap().0, Left::Asked);
    until("running alone", PATIENCE, || lock(&model.book).passing);
    let before = commits(&model);
    let (second, _stop, second_thread) = standby();
    *lock(&at) = second;
    until("protection", PATIENCE, || commits(&model) >= before + 5);
    assert!(!lock(&model.book).passing, "held again");
    stop.store(true, Ordering::SeqCst);
    assert!(matches!(protecting.join().unwrap(), End::Asked));
    let (left, held, image, ..) = second_thread.join().unwrap();
    assert_eq!(left, Left::Bye);
    assert!(image.0 == lock(&model.book).snapshots[&held.epoch], "S4");
}

/// A guest that sends nothing is let alone; what it sends ends the epoch, once.
#[test]
fn on_output() {
    let o = both(
        9,
        false,
        direct,
        |plan, _, _| {
            plan.pace = Pace::OnOutput {
                floor: Duration::from_millis(1),
            };
        },
        |hands| {
            let model = hands.model;
            until("the first commit", PATIENCE, || commits(model) >= 1);
            let settle = || {
                thread::sleep(Duration::from_millis(150));
                commits(model)
            };
            let before = settle();
            assert_eq!(settle(), before, "it was let alone");
            for n in 1..=5 {
                let open_epoch = lock(&model.book).epochs.open();
                let event = Event::OutputPending { open_epoch };
                hands.events.send(event).unwrap();
                until("a commit", PATIENCE, || commits(model) >= before + n);
                assert_eq!(settle(), before + n, "once");
            }
            // An order changes that while it runs.
            let (reply, answer) = channel();
            let ask = Ask::Pace(Pace::Fixed(Duration::from_millis(5)));
            hands.orders.send(Order { ask, reply }).unwrap();
            assert!(answer.recv_timeout(PATIENCE).unwrap().is_ok());
            until("more", PATIENCE, || commits(model) >= before + 20);
            hands.stop_primary.store(true, Ordering::SeqCst);
        },
    );
    check(&o);
}
