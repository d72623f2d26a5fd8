import csv,sys,random,collections
def load(path):
    data=collections.defaultdict(dict); 
    for line in open(path):
        if line[0]=='#' or line.startswith('turn'): continue
        t,ph,st,la,sl,ex=line.split(',')[:6]
        data[(int(ph),int(st))].setdefault(int(la),[]).append(int(ex))
    keys=sorted(data); 
    prompt=[data[k] for k in keys if k[0]==0]; dec=[data[k] for k in keys if k[0]==1]
    return prompt,dec
class Layer:
    def __init__(s,E,C,stale=None,promote=False,fill=False,wide='new'):
        s.E,s.C=E,C; s.last={}; s.cold={}; s.tick=0; s.coldtick=0; s.stale=stale; s.promote=promote; s.wide=wide
        if fill:
            for e in range(C): s.coldtick-=1; s.cold[e]=s.coldtick
    def res(s,e): return e in s.last or e in s.cold
    def step(s,ids):
        need=list(dict.fromkeys(ids)); N=len(need)
        hits=[e for e in need if s.res(e)]; miss=[e for e in need if not s.res(e)]
        if N<=s.C:
            for e in hits:
                s.cold.pop(e,None); s.tick+=1; s.last[e]=s.tick
            free=s.C-len(s.last)-len(s.cold)
            nv=max(0,len(miss)-free)
            if nv:
                ns=set(need)
                cand=[(s.cold[e],0,e) for e in s.cold if e not in ns]
                cand=sorted((s.cold[e],e) for e in s.cold if e not in ns)+sorted((s.last[e],e) for e in s.last if e not in ns)
                for _,e in cand[:nv]: s.last.pop(e,None); s.cold.pop(e,None)
            for e in miss: s.tick+=1; s.last[e]=s.tick
            return len(hits),N
        if s.wide=='stream': return len(hits),N
        ns=set(need)
        order={}
        for i,e in enumerate(ids): order[e]=i
        miss.sort(key=lambda e:-order[e])
        if s.wide=='lru':
            for e in hits: s.cold.pop(e,None); s.tick+=1; s.last[e]=s.tick
            vict=sorted((s.last[e],e) for e in s.last if e not in ns)
        else:
            for e in hits:
                if e in s.last: s.last[e]+=N
                elif s.promote: s.cold.pop(e); s.last[e]=s.tick+N
            s.tick+=N
            vict=sorted((s.cold[e],e) for e in s.cold if e not in ns)
            if s.stale: vict+=sorted((s.last[e],e) for e in s.last if e not in ns and s.tick-s.last[e]>s.stale*s.C)
        free=s.C-len(s.last)-len(s.cold)
        take=miss[:free+len(vict)]
        for _,e in vict[:max(0,len(take)-free)]: s.last.pop(e,None); s.cold.pop(e,None)
        for i,e in enumerate(take):
            if s.wide=='lru': s.last[e]=s.tick+len(take)-i
            else: s.cold[e]=s.coldtick-1-i
        s.coldtick-=len(take)
        if s.wide=='lru': s.tick+=len(take)
        return len(hits),N
def run(path,frac,B=1,foreign=None,tbt=False,prompt=True,after=None,**kw):
    pr,de=load(path); L=len(de[0]); E=128; C=int(frac*E+1e-9)
    layers=[Layer(E,C,**kw) for _ in range(L)]
    h=n=0
    rng=random.Random(0)
    if prompt:
        for la in range(L):
            if tbt:
                for t in pr: t.get(la) and layers[la].step(t[la])
            else: layers[la].step([e for t in pr for e in t.get(la,())])
    T=len(de); offs=[b*T//B for b in range(B)]
    for i in range(T):
        if foreign is not None and i==foreign:
            for la in range(L): x=list(range(E))*3; rng.shuffle(x); layers[la].step(x)
        for la in range(L):
            a,b=layers[la].step([e for o in offs for e in de[(i+o)%T].get(la,())])
            if after is None or i>=after: h+=a;n+=b
    return round(100*h/n,2)
Q='/work/shared/traces/qwen3-30b-a3b.route.csv'; G='/work/shared/traces/gpt-oss-120b.route.csv'
if __name__=='__main__':
    for f,name,fr in ((Q,'qwen',.352),(Q,'qwen',.25),(G,'oss',.35),(G,'oss',.125)):
        print(name,fr,'tbt',run(f,fr,tbt=True),'streamed',run(f,fr,wide='stream',fill=True),'new',run(f,fr),'new+stale+promote',run(f,fr,stale=4,promote=True))
        print('  foreign@27 after27: none',run(f,fr,after=27),'new',run(f,fr,after=27,foreign=27),'sp4',run(f,fr,after=27,foreign=27,stale=4,promote=True),'lru',run(f,fr,after=27,foreign=27,wide='lru'),'fill/stream',run(f,fr,after=27,foreign=27,wide='stream',fill=True))
    for B in (4,8,16):
        for fr in (.25,.352,.5):
            print('qwen B',B,fr,{str(k):run(Q,fr,B=B,prompt=False,**k) for k in (dict(wide='stream',fill=True),dict(),dict(promote=True),dict(promote=True,stale=2),dict(promote=True,stale=4),dict(promote=True,stale=8),dict(stale=4),dict(wide='lru'))})
