// SPDX-License-Identifier: GPL-2.0-or-later

//! Whatever fails and whenever: the image is one whole epoch's (S4), every committed epoch is in it
//! (S7), the guest runs, and an end in good order causes no take-over.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver as Queue, Sender};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::model::{flaky, until, Book, Copy, Failure, Model, Patient, Random, Toy};
use crate::args::Loss;
use crate::host::events::Event;
use crate::host::kernel::Hearing;
use crate::peer::channel::{Channel, Way};
use crate::peer::door::Limits;
use crate::peer::stream::{lock, Receiver};
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
use remus_proto::frame::Kind;

const PAGES: usize = 60;
/// Where nothing is to be noticed by silence: no host is so busy that it would be taken for dead.
const TIMEOUT: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(500);

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
    /// The newest epoch that the standby has acknowledged and applied.
    applied: &'a dyn Fn() -> u64,
    /// The standby has let go of the stream.
    left: &'a AtomicBool,
}

/// Hears what a test says.
struct Ear(Queue<Event>);

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

fn offer(timeout: Duration) -> Offer {
    Offer {
        domain: "toy".into(),
        memory: plan().memory,
        timeout,
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

/// How a standby stands by.
#[derive(Clone)]
struct Post {
    timeout: Duration,
    report: Report,
    stop: Arc<AtomicBool>,
    /// No primary will come any more.
    over: Arc<AtomicBool>,
    /// It cannot resume what it is handed.
    unable: bool,
}

impl Post {
    fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            report: Report::default(),
            stop: Arc::default(),
            over: Arc::default(),
            unable: false,
        }
    }
}

/// The next primary, if one comes before the deadline.
fn next(callers: &Callers, deadline: Instant, over: &AtomicBool) -> Option<Caller> {
    while Instant::now() < deadline {
        // Looked at first: it may have come and ended.
        let last = over.load(Ordering::SeqCst);
        if let Some((caller, _)) = callers.next(Duration::from_millis(20)) {
            return Some(caller);
        }
        if last {
            break;
        }
    }
    None
}

/// Serves primaries until the last one is dead, or has ended.
fn stand_by(callers: &Callers, post: &Post) -> (Left, Held, Copy, Instant, usize) {
    let (mut held, mut image) = (Held::default(), Copy(vec![0; PAGES * PAGE_SIZE]));
    let (mut again, mut served) = (None, 0);
    let mut deadline = Instant::now() + PATIENCE;
    let left = loop {
        let caller = match again.take() {
            Some(caller) => caller,
            None => match next(callers, deadline, &post.over) {
                Some(caller) => Box::new(caller),
                None => break Left::Dead,
            },
        };
        let mut parts = standby::Parts {
            callers,
            image: &mut image,
            disks: None,
            machine: &mut Patient,
            report: &post.report,
            stop: &post.stop,
            tick: &|| {},
        };
        let end = serve(*caller, &offer(post.timeout), &mut held, &mut parts);
        served += 1;
        match end {
            standby::End::Refused(e) => break Left::Refused(format!("{e:#}")),
            standby::End::Other(caller) => {
                // What it had was not whole.
                assert_eq!(held.epoch, 0);
                (held, image) = (Held::default(), Copy(vec![0; PAGES * PAGE_SIZE]));
                again = Some(caller);
            }
            standby::End::Bye(_) => break Left::Bye,
            standby::End::Asked => break Left::Asked,
            standby::End::Failed(e) => break Left::Failed(format!("{e:#}")),
            standby::End::Handover(primary) if post.unable => {
                primary.failed("no room");
                break Left::Failed("no room".into());
            }
            standby::End::Handover(primary) => {
                primary.resumed();
                break Left::Handover;
            }
            standby::End::Lost(lost) if lost.given_up => break Left::Dead,
            standby::End::Lost(lost) => {
                deadline = lost.heard + post.timeout;
                again = lost.again;
            }
        }
    };
    (left, held, image, Instant::now(), served)
}

/// Says that the primary has ended, however it does.
struct Over(Arc<AtomicBool>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
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
    let mut post = Post::new(plan.timeout);
    post.unable = model.unable.load(Ordering::SeqCst);
    let (saved, running) = (Arc::clone(&toy.saved), Arc::clone(&toy.running));
    let (callers, address) = callers();
    let (its, left) = (post.clone(), Arc::new(AtomicBool::new(false)));
    let gone = Arc::clone(&left);
    let receiving = thread::spawn(move || {
        let end = stand_by(&callers, &its);
        gone.store(true, Ordering::SeqCst);
        end
    });
    let stop_primary = Arc::new(AtomicBool::new(false));
    let (kernel, stop) = (model.clone(), Arc::clone(&stop_primary));
    let (order, orders) = channel();
    // On output is tested with something that tells of it.
    let (events, hearing) = channel();
    let hearing: Option<Box<dyn Hearing>> = match plan.pace {
        Pace::OnOutput { .. } => Some(Box::new(Ear(hearing))),
        _ => None,
    };
    let over = Arc::clone(&post.over);
    let protecting = thread::spawn(move || {
        let _ended = Over(over);
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
        if again {
            keep(&plan, &mut parts, &mut connect, link, Loss::Hold)
        } else {
            run(&plan, &mut parts, link, &mut pace)
        }
    });
    act(&Hands {
        model: &model,
        stop_primary: &stop_primary,
        stop_standby: &post.stop,
        orders: &order,
        events: &events,
        ended: &post.over,
        applied: &|| lock(post.report.live()).epoch,
        left: &left,
    });
    let (standby, held, image, left, served) = receiving.join().unwrap();
    if again && standby == Left::Dead {
        // It finds no standby any more, and would look for one for ever.
        stop_primary.store(true, Ordering::SeqCst);
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
    commits_in(&lock(&model.book))
}

fn commits_in(book: &Book) -> usize {
    book.commits.len()
}

/// Nothing takes nearly as long, even on a busy host.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn connection_dies_anywhere() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..24 {
        let failure = [Failure::Close, Failure::Stall, Failure::Flip][round % 3];
        // The first copy has some 250 kB; what goes over the control stream is little.
        let (which, most) = match round % 4 {
            0 => (0, [200, 100]),
            _ => (1, [700_000, 5_000]),
        };
        // From the start, or after so many commits.
        let sound = (round % 2) * (1 + random.below(5));
        let budget = match sound {
            0 => 60 + random.below(most[0]),
            _ => random.below(most[1]),
        };
        let left = Arc::new(AtomicUsize::new(if sound > 0 {
            usize::MAX
        } else {
            budget
        }));
        let fuse = Arc::clone(&left);
        // Only silence tells of this one.
        let silent = matches!(failure, Failure::Stall);
        let o = both(
            random.next(),
            false,
            move |to, n| match n == which {
                true => flaky(to, Arc::clone(&left), failure),
                false => direct(to, n),
            },
            |plan, _, _| {
                if silent {
                    plan.timeout = SHORT;
                }
            },
            |hands| {
                until("the first commits", PATIENCE, || {
                    let ended = hands.ended.load(Ordering::SeqCst);
                    // With so short a timeout it may end early on a busy host.
                    assert!(!ended || silent || sound == 0, "it has ended");
                    commits(hands.model) >= sound || ended
                });
                if sound > 0 {
                    fuse.store(budget, Ordering::SeqCst);
                }
            },
        );
        check(&o);
        assert!(
            !matches!(o.primary, End::Asked),
            "{failure:?} at {budget} of {which}"
        );
        match o.standby {
            Left::Dead => assert!(sound == 0 || silent || o.held.epoch >= sound as u64),
            // Damaged before it was welcome.
            Left::Refused(_) if sound == 0 || silent => {}
            other => panic!("{failure:?} at {budget} of {which}: {other:?}"),
        }
    }
}

/// The primary comes back, and goes on where it was, without sending all again.
#[test]
fn connection_comes_back() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for round in 0..9 {
        let failure = [Failure::Close, Failure::Flip, Failure::Close][round % 3];
        // Each connection has two streams; the first two lose the one or the other.
        let budgets = [(); 2].map(|()| 5_000 + random.below(500_000));
        let made = Arc::new(AtomicUsize::new(0));
        let connections = Arc::clone(&made);
        let o = both(
            random.next(),
            true,
            move |to, n| {
                let budget = match n {
                    1 => budgets[0],
                    3 => budgets[1],
                    _ => usize::MAX,
                };
                let stream = flaky(to, Arc::new(AtomicUsize::new(budget)), failure);
                made.store(n + 1, Ordering::SeqCst);
                stream
            },
            |_, _, _| {},
            |hands| {
                until("200 epochs and the third link", 3 * PATIENCE, || {
                    assert!(!hands.ended.load(Ordering::SeqCst), "it has ended");
                    let last = lock(&hands.model.book).commits.last().copied();
                    last.unwrap_or(0) > 200 && connections.load(Ordering::SeqCst) >= 6
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
            1 => flaky(to, Arc::new(AtomicUsize::new(usize::MAX)), Failure::Slow),
            _ => direct(to, n),
        },
        |plan, _, _| {
            plan.encoding.raw = true;
            // Less than all of the memory takes, and more than any host is kept from running.
            plan.timeout = Duration::from_secs(3);
        },
        |hands| {
            let mut most = 0;
            until(
                "an epoch that takes longer than the timeout",
                4 * PATIENCE,
                || {
                    // Before the first one the passes of the first copy wait too.
                    if commits(hands.model) >= 1 {
                        most = most.max(lock(&hands.model.book).epochs.sealed());
                    }
                    let book = lock(&hands.model.book);
                    let long = |w: &[Instant]| w[1] - w[0] > Duration::from_secs(3);
                    commits_in(&book) >= 3 && book.begun.windows(2).any(long)
                },
            );
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
        let post = Post::new(TIMEOUT);
        let over = Arc::clone(&post.over);
        let serving = thread::spawn(move || stand_by(&callers, &post).0);
        let told = if change == 2 {
            let near = direct(address, 0);
            let rubbish = b"GET / HTTP/1.1\r\nHost: standby\r\n\r\n____";
            std::io::Write::write_all(&mut &near, rubbish).unwrap();
            let (reader, _writer, handle) = plain(near).unwrap().split();
            let mut receiver = Receiver::new(reader, &handle, PATIENCE).unwrap();
            let (header, payload) = receiver.next().unwrap();
            assert_eq!(header.kind, Kind::Error);
            String::from_utf8(payload).unwrap()
        } else {
            let mut connect = move || plain(direct(address, 0));
            format!("{:#}", introduce(&plan, &mut connect).err().unwrap())
        };
        let why = [
            "not for other",
            "memory on the primary",
            "does not speak the Remus protocol",
        ];
        assert!(told.contains(why[change]), "{told}");
        over.store(true, Ordering::SeqCst);
        match serving.join().unwrap() {
            Left::Refused(e) => assert!(change < 2 && e.contains(why[change])),
            other => assert_eq!((other, change), (Left::Dead, 2)),
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
            let gate = lock(&model.gate);
            let last = || lock(&model.book).commits.last().copied().unwrap_or(0);
            until("the slow commit", PATIENCE, || commits(model) > *gate);
            until("later acknowledgements", PATIENCE, || {
                (hands.applied)() > last()
            });
            hands.stop_standby.store(true, Ordering::SeqCst);
            until("the standby's end", PATIENCE, || {
                hands.left.load(Ordering::SeqCst)
            });
            drop(gate);
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
    // More than any host is kept from running.
    let timeout = Duration::from_secs(5);
    let o = both(
        7,
        false,
        direct,
        |plan, _, _| plan.timeout = timeout,
        |hands| {
            let model = hands.model;
            until("five commits", PATIENCE, || commits(model) >= 5);
            let gate = lock(&model.gate);
            until("a slow commit", PATIENCE, || commits(model) > *gate);
            thread::sleep(timeout + timeout / 2);
            drop(gate);
            let now = commits(model);
            until("five more", PATIENCE, || commits(model) >= now + 5);
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
        let post = Post::new(TIMEOUT);
        let stop = Arc::clone(&post.stop);
        let thread = thread::spawn(move || stand_by(&callers, &post));
        (address, stop, thread)
    };
    let (first, first_stop, first_thread) = standby();
    // Nowhere when there is none: somebody else may have its port then.
    let at = Arc::new(std::sync::Mutex::new(Some(first)));
    let (stop, address) = (Arc::new(AtomicBool::new(false)), Arc::clone(&at));
    let (kernel, end) = (model.clone(), Arc::clone(&stop));
    let protecting = thread::spawn(move || {
        let mut connect = move || match *lock(&address) {
            Some(address) => plain(TcpStream::connect(address)?),
            None => anyhow::bail!("there is no standby"),
        };
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
    *lock(&at) = None;
    first_stop.store(true, Ordering::SeqCst);
    assert_eq!(first_thread.join().unwrap().0, Left::Asked);
    until("running alone", PATIENCE, || lock(&model.book).passing);
    let before = commits(&model);
    let (second, _stop, second_thread) = standby();
    *lock(&at) = Some(second);
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
